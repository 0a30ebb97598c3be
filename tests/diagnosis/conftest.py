from metal_stand_in import metal

__all__ = ["metal"]
