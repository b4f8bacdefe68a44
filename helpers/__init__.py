"""Numerics, teaching tools and authoring tools behind the notebooks.

Importing this package first looks at the environment, so that a reader with the wrong Python or a
missing package gets one sentence that says what to do instead of a traceback from deep inside.
"""

from helpers.environment import require_environment

require_environment()
