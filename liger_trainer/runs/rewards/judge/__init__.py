"""Code that runs inside the sandbox: only the standard library, without the rest of the package."""
