-- A file that is sealed while the disk is full gets its sidecar later, by its rows: they know all that it says.

-- JSON: [{"startFrame", "frames"}], while the sender called itself muted
ALTER TABLE seals ADD COLUMN mute_spans TEXT NOT NULL DEFAULT '[]';
