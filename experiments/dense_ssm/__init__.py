"""Does the dense connection help at equal size? See README.md beside this file."""
