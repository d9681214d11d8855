"""From image folders and archives to WebDataset shards with an index."""
