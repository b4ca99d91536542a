"""The command line `w2s`: one thin module per command."""
