"""Who runs shards: the driver hands them out to threads of this process or to actors of a Ray cluster."""
