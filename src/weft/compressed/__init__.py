"""Adapter folders made smaller, or turned into LoRA: opened, measured, and written with where they came from."""

from weft.compressed.convert import ConvertedFolder, convert_folder
from weft.compressed.folders import CompressedFolder, LossIn, compress_folders
from weft.compressed.together import CompressedSet, compress_set

__all__ = [
    "CompressedFolder",
    "CompressedSet",
    "ConvertedFolder",
    "LossIn",
    "compress_folders",
    "compress_set",
    "convert_folder",
]
