"""`python -m fluxclip.cli`, where the console command is not installed."""

from fluxclip.cli import main

main()
