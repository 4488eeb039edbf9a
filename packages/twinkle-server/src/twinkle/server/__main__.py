"""`python -m twinkle.server` is `twinkle-server`."""

from twinkle.server.cli import main

main()
