"""From records to ratios, verdicts, fits, tables and figures. Nothing here measures; nothing here needs a GPU."""
