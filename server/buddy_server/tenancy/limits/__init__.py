"""What a tenant may use: requests and layer-tokens in a minute, answers at once, layer-tokens in a month."""
