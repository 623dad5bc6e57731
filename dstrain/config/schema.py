"""thin"""
def check_schema(config): return []
