-- Everything here is SQL that SQLite and PostgreSQL both accept. Times are UTC. Ids that the server makes are UUIDv7 as text.

-- One life of a room. Webhooks make them; the end is final.
CREATE TABLE sessions (
    id TEXT NOT NULL PRIMARY KEY,
    meeting_id TEXT NOT NULL UNIQUE,
    room_name TEXT NOT NULL,
    room_sid TEXT UNIQUE,
    status TEXT NOT NULL CHECK (status IN ('ACTIVE', 'ENDED')),
    started_at TIMESTAMP NOT NULL,
    ended_at TIMESTAMP
);
CREATE INDEX sessions_newest ON sessions (started_at, id);
CREATE INDEX sessions_of_room ON sessions (room_name, started_at);

CREATE TABLE participants (
    id TEXT NOT NULL PRIMARY KEY,
    session_id TEXT NOT NULL REFERENCES sessions (id),
    sid TEXT NOT NULL,
    identity TEXT NOT NULL,
    name TEXT NOT NULL,
    kind TEXT NOT NULL,
    -- the event that said name and kind; a later one replaces them
    described_at TIMESTAMP,
    joined_at TIMESTAMP,
    left_at TIMESTAMP,
    UNIQUE (session_id, sid)
);

-- A published track, known from webhooks, from an egress connection, or both.
CREATE TABLE tracks (
    id TEXT NOT NULL PRIMARY KEY,
    session_id TEXT REFERENCES sessions (id),
    room_name TEXT NOT NULL,
    sid TEXT,
    identity TEXT,
    kind TEXT NOT NULL,
    source TEXT NOT NULL,
    name TEXT NOT NULL,
    mime_type TEXT NOT NULL,
    described_at TIMESTAMP,
    published_at TIMESTAMP,
    unpublished_at TIMESTAMP,
    -- what the arriving rate contradicts, in words
    format_mismatch TEXT,
    -- JSON: [{"startMs", "endMs"}] from the first sample of the recording; no end while it is muted
    mute_spans TEXT NOT NULL,
    UNIQUE (session_id, sid)
);
CREATE INDEX tracks_without_session ON tracks (room_name, session_id);

-- All segments of one track in a session.
CREATE TABLE recordings (
    id TEXT NOT NULL PRIMARY KEY,
    session_id TEXT REFERENCES sessions (id),
    track_id TEXT NOT NULL REFERENCES tracks (id),
    -- what the files are kept under; a session that appears later does not change it
    meeting_id TEXT NOT NULL,
    room_name TEXT NOT NULL,
    participant TEXT,
    track_sid TEXT,
    started_at TIMESTAMP NOT NULL,
    ended_at TIMESTAMP
);
CREATE INDEX recordings_of_session ON recordings (session_id, started_at, id);
CREATE INDEX recordings_of_meeting ON recordings (meeting_id, started_at, id);
CREATE INDEX recordings_of_room ON recordings (room_name, session_id);
CREATE INDEX recordings_newest ON recordings (started_at, id);
CREATE INDEX recordings_of_track ON recordings (track_id);

-- One file.
CREATE TABLE segments (
    id TEXT NOT NULL PRIMARY KEY,
    recording_id TEXT NOT NULL REFERENCES recordings (id),
    -- below the audio directory
    path TEXT NOT NULL UNIQUE,
    format TEXT NOT NULL CHECK (format IN ('wav')),
    sample_rate INTEGER NOT NULL,
    channels INTEGER NOT NULL,
    -- final once the segment has ended
    frames BIGINT NOT NULL,
    bytes BIGINT NOT NULL,
    started_at TIMESTAMP NOT NULL,
    ended_at TIMESTAMP,
    end_reason TEXT CHECK (end_reason IN ('closed', 'lost', 'idle', 'superseded', 'shutdown', 'rotated', 'violation', 'ticketSpent', 'failed', 'crashed')),
    -- JSON: [{"startFrame", "frames", "reason"}]
    gaps TEXT NOT NULL,
    -- of the connection's first segment: a ticket opens one connection, ever
    ticket_id TEXT UNIQUE
);
CREATE INDEX segments_of_recording ON segments (recording_id, started_at, id);
CREATE INDEX segments_open ON segments (ended_at);

-- Every webhook that was believed, once.
CREATE TABLE webhook_events (
    id TEXT NOT NULL PRIMARY KEY,
    event TEXT NOT NULL,
    room_sid TEXT,
    room_name TEXT,
    created_at TIMESTAMP NOT NULL,
    received_at TIMESTAMP NOT NULL,
    understood BOOLEAN NOT NULL,
    body TEXT NOT NULL
);
CREATE INDEX webhook_events_received ON webhook_events (received_at);

-- What an analysis service said of a stretch of a recording.
CREATE TABLE measurements (
    id TEXT NOT NULL PRIMARY KEY,
    recording_id TEXT NOT NULL REFERENCES recordings (id),
    service TEXT NOT NULL,
    kind TEXT NOT NULL,
    -- from the first sample of the recording
    start_ms BIGINT NOT NULL,
    end_ms BIGINT NOT NULL,
    -- JSON: {"name": score}
    scores TEXT NOT NULL,
    -- the service's code and words where it found nothing
    warning TEXT,
    received_at TIMESTAMP NOT NULL
);
CREATE INDEX measurements_of_recording ON measurements (recording_id, id);
