"""Images with boxes, masks or class maps: composed scenes, and the common annotation formats."""
