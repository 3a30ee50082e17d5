"""The commands of `liger-trainer`. A module adds its parser and holds its `main`; what takes long
to import is imported when it runs."""
