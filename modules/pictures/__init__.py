"""Drawing of image grids, charts, boxes and masks."""
