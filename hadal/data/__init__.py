"""Training data: puzzle generators, the tokenizer of hadal-mini, token shards, packed rows."""
