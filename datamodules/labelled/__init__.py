"""Images with one label each: published data sets, folders, tables."""
