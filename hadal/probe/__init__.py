"""Studies of what a model represents: vectors out of its layers, and statistics that can say "nothing".

    from hadal.probe.backends import Item, Local

    items = [Item("1", "I see the moon.", spans=((2, 5),)), Item("2", "I know this.", spans=((2, 6),))]
    found = Local("hadal-mini").embed(items, layers=(0, 4), pooling="span")
    found.vectors.shape, found.identity.label()

Every set of vectors carries the identity of what made it (identity.py), in memory and in files (table.py).
"""
