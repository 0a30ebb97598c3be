"""Classes whose attributes live in slots."""


class Slotted:
    __slots__ = ("__private", "__weakref__", "seen")

    def __init__(self):
        self.seen = [1]
        self.__private = "a"


class Single:
    __slots__ = "only"
