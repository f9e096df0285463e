"""The commands of the terminal, grouped by what they are for; no logic of their own.

Every command reads its words (`terminal.grammar`, `terminal.options`), opens what they
name (`terminal.sources`), calls one verb, and shows what it returns
(`terminal.console`).
"""
