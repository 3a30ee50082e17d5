"""What runs inside the sandbox: standard library only, loaded without the rest of the package."""
