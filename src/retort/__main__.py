"""``python -m retort``, for launchers such as ``accelerate launch -m retort distill ...``."""

from retort.cli import main

main()
