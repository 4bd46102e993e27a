"""Images with one label each, of a class or a person: sets that others have made, folders, tables of paths."""
