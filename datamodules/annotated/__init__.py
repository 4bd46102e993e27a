"""Images with boxes, masks or a class for each pixel: composed scenes, and the formats in which people keep theirs."""
