"""The console of the commands."""

from ..monitor.console import Console as Console
from ..monitor.console import visible as visible
