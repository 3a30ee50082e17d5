"""The commands of `liger-trainer`. A module declares its arguments and holds its `main`; what takes
long to import is imported when it runs."""
