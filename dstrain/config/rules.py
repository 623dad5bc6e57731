"""thin"""
def check_rules(config, dims, facts, batch): return [], {}
