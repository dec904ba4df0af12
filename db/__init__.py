"""The database: schema, engine, migrations; knows neither dicomnode nor training."""
