"""Complete checkpoints, copied elsewhere while a run goes on, and a run fetched from there by a new machine.

``sync: FOLDER`` or ``sync: hub:OWNER/NAME`` names the place. There lies, of each stage, what a new machine needs:

    NAME/STAGE/  stage.json  config.yaml  metrics.jsonl  reference-*.safetensors  checkpoint-N/  adapter/  delta/

with the newest and the best checkpoint. Every folder there has a manifest and appears complete or not at all.
"""

from .fetch import newest_there, restore
from .mirror import Mirror, catch_up, kept_elsewhere, open_mirror

__all__ = ["Mirror", "catch_up", "kept_elsewhere", "newest_there", "open_mirror", "restore"]
