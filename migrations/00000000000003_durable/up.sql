-- What makes a segment provable: formats besides WAV, more ways to end, and what its sidecar says.

-- A CHECK cannot be changed in SQLite: the table is made anew, with the same rows.
CREATE TABLE segments_3 (
    id TEXT NOT NULL PRIMARY KEY,
    recording_id TEXT NOT NULL REFERENCES recordings (id),
    -- below the audio directory, or the video directory where the format is not wav
    path TEXT NOT NULL,
    format TEXT NOT NULL CHECK (format IN ('wav', 'h264', 'ivf')),
    -- 0 for video
    sample_rate INTEGER NOT NULL,
    channels INTEGER NOT NULL,
    -- final once the segment has ended; of video, its pictures
    frames BIGINT NOT NULL,
    bytes BIGINT NOT NULL,
    started_at TIMESTAMP NOT NULL,
    ended_at TIMESTAMP,
    end_reason TEXT CHECK (end_reason IN (
        'closed', 'lost', 'idle', 'superseded', 'shutdown', 'rotated', 'gap', 'violation', 'ticketSpent', 'failed', 'crashed'
    )),
    -- JSON: [{"startFrame", "frames", "reason"}]
    gaps TEXT NOT NULL,
    -- of the connection's first segment: a ticket opens one connection, ever
    ticket_id TEXT UNIQUE,
    -- whose disk the file lies on
    server_id TEXT,
    -- the recording goes on when a participant publishes anew, under another SID
    track_sid TEXT,
    UNIQUE (format, path)
);
INSERT INTO segments_3 (
    id, recording_id, path, format, sample_rate, channels, frames, bytes, started_at, ended_at, end_reason, gaps, ticket_id, server_id, track_sid
) SELECT
    id, recording_id, path, format, sample_rate, channels, frames, bytes, started_at, ended_at, end_reason, gaps, ticket_id, server_id, track_sid
FROM segments;
DROP TABLE segments;
ALTER TABLE segments_3 RENAME TO segments;
CREATE INDEX segments_of_recording ON segments (recording_id, started_at, id);
CREATE INDEX segments_open ON segments (ended_at);

-- What is known of a finished file, as in its sidecar. Segments that ended before this table was made have no row.
CREATE TABLE seals (
    segment_id TEXT NOT NULL PRIMARY KEY REFERENCES segments (id),
    -- the writer died, and the length was found out from the file
    recovered BOOLEAN NOT NULL,
    -- a sync failed while it was written: what the disk holds may differ from what was written
    suspect BOOLEAN NOT NULL,
    -- the end that a power cut may have spoilt
    tail_unverified_ms BIGINT NOT NULL,
    -- from the start of the session, as far as one is known
    session_offset_ms BIGINT,
    -- how much faster the sender's clock runs than ours, in millionths
    drift_ppm DOUBLE PRECISION,
    -- of the whole file, in hexadecimal; follows later
    sha256 TEXT,
    -- of video
    width INTEGER,
    height INTEGER
);
CREATE INDEX seals_without_hash ON seals (sha256);
