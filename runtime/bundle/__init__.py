"""Bundles on disk: ``open`` reads and checks them, ``write`` makes and seals them, ``digest`` hashes their files."""
