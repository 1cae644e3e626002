DROP TABLE measurements;
DROP TABLE webhook_events;
DROP TABLE segments;
DROP TABLE recordings;
DROP TABLE tracks;
DROP TABLE participants;
DROP TABLE sessions;
