"""An OpenAI-compatible server in front of an engine."""

from hymba.serving.app import create_app
from hymba.serving.guard import Guard, GuardStream, PatternGuard
from hymba.serving.server import serve
from hymba.serving.settings import Settings

__all__ = ["Guard", "GuardStream", "PatternGuard", "Settings", "create_app", "serve"]
