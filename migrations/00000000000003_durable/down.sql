DROP TABLE seals;
-- Only what the older schema knows can go back to it.
DELETE FROM segments WHERE format <> 'wav';
UPDATE segments SET end_reason = 'idle' WHERE end_reason = 'gap';
CREATE TABLE segments_2 (
    id TEXT NOT NULL PRIMARY KEY,
    recording_id TEXT NOT NULL REFERENCES recordings (id),
    path TEXT NOT NULL UNIQUE,
    format TEXT NOT NULL CHECK (format IN ('wav')),
    sample_rate INTEGER NOT NULL,
    channels INTEGER NOT NULL,
    frames BIGINT NOT NULL,
    bytes BIGINT NOT NULL,
    started_at TIMESTAMP NOT NULL,
    ended_at TIMESTAMP,
    end_reason TEXT CHECK (end_reason IN ('closed', 'lost', 'idle', 'superseded', 'shutdown', 'rotated', 'violation', 'ticketSpent', 'failed', 'crashed')),
    gaps TEXT NOT NULL,
    ticket_id TEXT UNIQUE,
    server_id TEXT,
    track_sid TEXT
);
INSERT INTO segments_2 (
    id, recording_id, path, format, sample_rate, channels, frames, bytes, started_at, ended_at, end_reason, gaps, ticket_id, server_id, track_sid
) SELECT
    id, recording_id, path, format, sample_rate, channels, frames, bytes, started_at, ended_at, end_reason, gaps, ticket_id, server_id, track_sid
FROM segments;
DROP TABLE segments;
ALTER TABLE segments_2 RENAME TO segments;
CREATE INDEX segments_of_recording ON segments (recording_id, started_at, id);
CREATE INDEX segments_open ON segments (ended_at);
