"""What maintainers run: ``python -m helpers.authoring build | look | bench | new``. Notebooks never import it."""
