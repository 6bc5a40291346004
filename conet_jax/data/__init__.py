"""From raw files of two domains to arrays: readers, dataset, split, audit, store, download."""
