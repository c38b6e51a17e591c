"""The embedded models and how they were made."""

import os

# Read by diffusers when it is imported, here as in the scripts: no model brings code of its own.
os.environ.setdefault("DIFFUSERS_DISABLE_REMOTE_CODE", "1")
