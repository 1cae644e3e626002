ALTER TABLE seals DROP COLUMN mute_spans;
