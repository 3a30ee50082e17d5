"""The commands of `liger-trainer`. Each module declares its arguments and has a `main`, which
imports slow modules only when it runs."""
