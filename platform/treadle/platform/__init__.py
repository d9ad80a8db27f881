"""The ground floor: records, contracts, configuration, errors, ledger, storage, tracking, objectives."""
