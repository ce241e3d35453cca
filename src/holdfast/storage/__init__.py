"""Files of a store: names, durable writes, the commit."""
