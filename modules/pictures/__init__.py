"""Pictures that a person asks for: sheets, charts, boxes."""
