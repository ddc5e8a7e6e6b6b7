"""How fast is every stage, against a plain implementation of the same algorithm and against the arithmetic itself?"""
