"""Where weights lie: named blobs in whatever can hold them. `open_blobs` chooses by the value of `weights.store`."""
