# The compiled library, for type checkers. It has no names: importing it registers torch.ops.lserve_ext.
