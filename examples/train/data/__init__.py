"""Labelled images: loading, splits, augmentation."""
