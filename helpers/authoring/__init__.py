"""What maintainers run, and notebooks never import; ``python -m helpers.authoring --help`` lists the commands."""
