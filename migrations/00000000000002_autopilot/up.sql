-- What makes recordings begin by themselves, and what is kept of everything that LiveKit said.

-- The servers that share this database. One that was not seen for a while is dead, and others take over its egresses.
CREATE TABLE servers (
    id TEXT NOT NULL PRIMARY KEY,
    seen_at TIMESTAMP NOT NULL
);

ALTER TABLE sessions ADD COLUMN metadata TEXT NOT NULL DEFAULT '';
-- what said the metadata; a later one replaces it
ALTER TABLE sessions ADD COLUMN described_at TIMESTAMP;

ALTER TABLE participants ADD COLUMN role TEXT NOT NULL DEFAULT '';
ALTER TABLE participants ADD COLUMN metadata TEXT NOT NULL DEFAULT '';
-- JSON: {"name": "value"}
ALTER TABLE participants ADD COLUMN attributes TEXT NOT NULL DEFAULT '{}';

ALTER TABLE tracks ADD COLUMN encryption TEXT NOT NULL DEFAULT '';
-- what an operator wants, whatever the rules say
ALTER TABLE tracks ADD COLUMN wish TEXT CHECK (wish IN ('record', 'stop'));

-- Files lie with the server that wrote them: only that one may measure them after a crash.
ALTER TABLE recordings ADD COLUMN server_id TEXT;
ALTER TABLE segments ADD COLUMN server_id TEXT;
-- the recording goes on when a participant publishes anew, under another SID
ALTER TABLE segments ADD COLUMN track_sid TEXT;

-- How often the event came or was applied again, and what came of it.
ALTER TABLE webhook_events ADD COLUMN attempts INTEGER NOT NULL DEFAULT 1;
ALTER TABLE webhook_events ADD COLUMN outcome TEXT NOT NULL DEFAULT 'applied' CHECK (outcome IN ('applied', 'noRoom', 'notUnderstood', 'failed'));
ALTER TABLE webhook_events ADD COLUMN problem TEXT;
CREATE INDEX webhook_events_of_room ON webhook_events (room_name, received_at);

-- Every step of a session, of its participants and its tracks, with who caused it; written with the step itself.
CREATE TABLE transitions (
    id TEXT NOT NULL PRIMARY KEY,
    session_id TEXT NOT NULL REFERENCES sessions (id),
    -- the participant's or the track's SID; none for the session itself
    subject TEXT,
    step TEXT NOT NULL CHECK (step IN ('started', 'ended', 'joined', 'left', 'published', 'unpublished', 'recordWanted', 'stopWanted')),
    -- when it happened, as far as known
    at TIMESTAMP NOT NULL,
    cause TEXT NOT NULL CHECK (cause IN ('webhook', 'reconciler', 'operator')),
    -- the webhook that told it
    event_id TEXT,
    recorded_at TIMESTAMP NOT NULL
);
CREATE INDEX transitions_of_session ON transitions (session_id, id);

-- A track egress of ours, from the wish for it to its end. The start queue is its open rows.
CREATE TABLE egresses (
    id TEXT NOT NULL PRIMARY KEY,
    track_id TEXT NOT NULL REFERENCES tracks (id),
    state TEXT NOT NULL CHECK (state IN ('QUEUED', 'STARTING', 'ACTIVE', 'LOST', 'ENDED', 'SKIPPED')),
    -- whose work it is
    server_id TEXT NOT NULL,
    -- LiveKit's, once it has answered
    egress_id TEXT UNIQUE,
    -- of the URL that was asked with last
    ticket_id TEXT UNIQUE,
    -- how often LiveKit was asked
    attempts INTEGER NOT NULL,
    -- egresses of this track that this one follows
    restarts INTEGER NOT NULL,
    last_error TEXT,
    -- from where the egress dialled
    node TEXT,
    created_at TIMESTAMP NOT NULL,
    -- not asked for before this
    due_at TIMESTAMP NOT NULL,
    -- LiveKit has agreed
    started_at TIMESTAMP,
    -- its socket is open
    connected_at TIMESTAMP,
    ended_at TIMESTAMP,
    end_reason TEXT
);
-- The claim: a track has one open egress, whoever asks for it.
CREATE UNIQUE INDEX egresses_claim ON egresses (track_id) WHERE ended_at IS NULL;
CREATE INDEX egresses_of_track ON egresses (track_id, created_at);
CREATE INDEX egresses_open ON egresses (ended_at, server_id);
CREATE INDEX egresses_newest ON egresses (created_at, id);
