-- Written by hand after the "SQLite Schema Reference" of Nsight Systems' documentation; no GPU has made it.
-- An SQLite export of Nsight Systems in small: two units of work, times in nanoseconds. Process 100, thread 101 works, thread 102
-- is autograd's; process 200 is somebody else's, whose calls have the same correlation numbers.
CREATE TABLE StringIds (id INTEGER NOT NULL PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE NVTX_EVENTS (start INTEGER NOT NULL, end INTEGER, eventType INTEGER NOT NULL, rangeId INTEGER, category INTEGER,
    color INTEGER, text TEXT, globalTid INTEGER, endGlobalTid INTEGER, textId INTEGER, domainId INTEGER, uint64Value INTEGER,
    int64Value INTEGER, doubleValue REAL, uint32Value INTEGER, int32Value INTEGER, floatValue REAL, jsonTextId INTEGER,
    jsonText TEXT);
CREATE TABLE CUPTI_ACTIVITY_KIND_RUNTIME (start INTEGER NOT NULL, end INTEGER NOT NULL, eventClass INTEGER NOT NULL,
    globalTid INTEGER, correlationId INTEGER, nameId INTEGER NOT NULL, returnValue INTEGER NOT NULL, callchainId INTEGER);
CREATE TABLE CUPTI_ACTIVITY_KIND_KERNEL (start INTEGER NOT NULL, end INTEGER NOT NULL, deviceId INTEGER NOT NULL,
    contextId INTEGER NOT NULL, streamId INTEGER NOT NULL, correlationId INTEGER, globalPid INTEGER,
    demangledName INTEGER NOT NULL, shortName INTEGER NOT NULL, mangledName INTEGER, launchType INTEGER, gridX INTEGER NOT NULL,
    blockX INTEGER NOT NULL, registersPerThread INTEGER NOT NULL, graphNodeId INTEGER);
CREATE TABLE CUPTI_ACTIVITY_KIND_MEMCPY (start INTEGER NOT NULL, end INTEGER NOT NULL, deviceId INTEGER NOT NULL,
    contextId INTEGER NOT NULL, streamId INTEGER NOT NULL, correlationId INTEGER, globalPid INTEGER, bytes INTEGER NOT NULL,
    copyKind INTEGER NOT NULL);
CREATE TABLE CUPTI_ACTIVITY_KIND_MEMSET (start INTEGER NOT NULL, end INTEGER NOT NULL, deviceId INTEGER NOT NULL,
    contextId INTEGER NOT NULL, streamId INTEGER NOT NULL, correlationId INTEGER, globalPid INTEGER, value INTEGER NOT NULL,
    bytes INTEGER NOT NULL);

INSERT INTO StringIds VALUES (1, 'unit of work'), (2, 'student'), (3, 'block'), (4, 'void conv_kernel<float, 64>(float *)'),
    (5, 'conv_kernel'), (6, 'step_kernel'), (7, 'cudaLaunchKernel_v7000'), (8, 'cudaMemcpyAsync_v3020'), (9, 'cuLaunchKernelEx');

-- Domains, a library's range, ours, one that the capture's end cut off.
INSERT INTO NVTX_EVENTS (start, end, eventType, text, textId, domainId, globalTid) VALUES
    (10, NULL, 75, 'advkd', NULL, 1, 100 * 16777216 + 101),
    (20, NULL, 75, 'CUDNN', NULL, 2, 100 * 16777216 + 101),
    (1000, 11000, 59, NULL, 1, 1, 100 * 16777216 + 101),
    (2000, 8000, 59, NULL, 2, 1, 100 * 16777216 + 101),
    (2100, 2600, 59, 'cudnnConvolutionForward', NULL, 2, 100 * 16777216 + 101),
    (3000, 5000, 59, NULL, 3, 1, 100 * 16777216 + 101),
    (20000, 30000, 59, NULL, 1, 1, 100 * 16777216 + 101),
    (21000, 26000, 59, 'student', NULL, 1, 100 * 16777216 + 101),
    (30500, NULL, 59, NULL, 2, 1, 100 * 16777216 + 101);

-- Correlation 5 is a runtime's call and the driver's inside it.
INSERT INTO CUPTI_ACTIVITY_KIND_RUNTIME VALUES
    (500, 550, 0, 100 * 16777216 + 101, 4, 7, 0, NULL),
    (2200, 2250, 0, 100 * 16777216 + 101, 1, 7, 0, NULL),
    (2300, 2350, 0, 200 * 16777216 + 201, 1, 7, 0, NULL),
    (3500, 3550, 0, 100 * 16777216 + 102, 2, 7, 0, NULL),
    (8500, 8550, 0, 100 * 16777216 + 101, 3, 8, 0, NULL),
    (21500, 21600, 0, 100 * 16777216 + 101, 5, 7, 0, NULL),
    (21510, 21590, 1, 100 * 16777216 + 101, 5, 9, 0, NULL),
    (25500, 25550, 0, 100 * 16777216 + 101, 6, 8, 0, NULL);

-- One from before the unit, which runs into it; two that overlap; another process's; the second unit's.
INSERT INTO CUPTI_ACTIVITY_KIND_KERNEL VALUES
    (600, 1200, 0, 1, 7, 4, 100 * 16777216, 4, 5, NULL, 0, 1, 128, 32, NULL),
    (3000, 6000, 0, 1, 7, 1, 100 * 16777216, 4, 5, NULL, 0, 1, 128, 32, NULL),
    (5000, 7000, 0, 1, 8, 2, 100 * 16777216, 6, 6, NULL, 0, 1, 128, 32, NULL),
    (4000, 5000, 0, 1, 7, 1, 200 * 16777216, 4, 5, NULL, 0, 1, 128, 32, NULL),
    (22000, 25000, 0, 1, 7, 5, 100 * 16777216, 4, 5, NULL, 0, 1, 128, 32, 17);
INSERT INTO CUPTI_ACTIVITY_KIND_MEMCPY VALUES (9000, 9500, 0, 1, 7, 3, 100 * 16777216, 4096, 2);
INSERT INTO CUPTI_ACTIVITY_KIND_MEMSET VALUES (26000, 26200, 0, 1, 7, 6, 100 * 16777216, 0, 64);
