import Testing

@testable import HTTPStorage

@Suite struct HTTPAnswerTests {
    private func answer(_ lines: String...) -> HTTPAnswer {
        var answer = HTTPAnswer()
        for line in lines { answer.note(line) }
        return answer
    }

    @Test func readsAHead() {
        let found = answer(
            "HTTP/1.1 206 Partial Content", "Content-Range: bytes 100-199/1000",
            "content-length:  100 ", "ETag: \"a b\"", "Retry-After: 7")
        #expect(found.status == 206 && found.reason == "Partial Content")
        #expect(found.range == 100..<200 && found.total == 1000 && found.length == 100)
        #expect(found.etag == "\"a b\"" && found.retryAfter == 7)
        #expect(answer("HTTP/2 200").statusText == "200")
    }

    /// The head of a redirect comes before the one that counts.
    @Test func forgetsTheHeadBefore() {
        let found = answer(
            "HTTP/1.1 302 Found", "ETag: \"old\"", "Content-Length: 5", "HTTP/1.1 200 OK")
        #expect(found == answer("HTTP/1.1 200 OK"))
    }

    @Test(arguments: [
        "bytes 5-4/10", "bytes -1-4/10", "bytes a-b/10", "bytes 0-9223372036854775807/*",
        "lines 0-4/10", "bytes 0-4",
    ])
    func takesNoWrongRange(_ value: String) {
        #expect(answer("HTTP/1.1 206 x", "Content-Range: \(value)").range == nil)
    }

    @Test func readsTheSizeAlone() {
        #expect(answer("HTTP/1.1 416 x", "Content-Range: bytes */1000").total == 1000)
        #expect(answer("HTTP/1.1 206 x", "Content-Range: bytes 0-4/*").total == nil)
    }

    private static let version = HTTPVersion(size: 1000, etag: "\"1\"", lastModified: "Mon")

    private func verdict(_ lines: String..., version: HTTPVersion? = version) -> HTTPVerdict {
        var answer = HTTPAnswer()
        for line in lines { answer.note(line) }
        return HTTPVerdict(answer, wanted: 100..<200, version: version)
    }

    @Test func takesWhatWasAskedFor() {
        let head = "HTTP/1.1 206 x"
        #expect(
            verdict(head, "Content-Range: bytes 100-199/1000", "ETag: \"1\"") == .range(100..<200))
        // A server may send less; the rest is asked for again.
        #expect(verdict(head, "Content-Range: bytes 100-149/1000") == .range(100..<150))
        #expect(verdict(head, "Content-Range: bytes 100-149/*") == .range(100..<150))
        for range in ["101-199/1000", "0-99/1000", "100-200/1000"] {
            guard case .error(let reason) = verdict(head, "Content-Range: bytes \(range)")
            else { return #expect(Bool(false), "\(range)") }
            #expect(reason.contains("instead of 100 to 199"), "\(reason)")
        }
        guard case .error = verdict(head) else { return #expect(Bool(false)) }
    }

    @Test func noticesAnotherVersion() {
        let head = "HTTP/1.1 206 x"
        let range = "Content-Range: bytes 100-199/1000"
        #expect(verdict(head, range, "ETag: \"2\"") == .changed)
        #expect(verdict(head, "Content-Range: bytes 100-199/1001", "ETag: \"1\"") == .changed)
        #expect(verdict("HTTP/1.1 412 x") == .changed)
        #expect(verdict("HTTP/1.1 416 x", "Content-Range: bytes */50") == .changed)
        let dated = HTTPVersion(size: 1000, lastModified: "Mon")
        #expect(verdict(head, range, "Last-Modified: Tue", version: dated) == .changed)
        #expect(verdict(head, range, "Last-Modified: Mon", version: dated) == .range(100..<200))
    }

    @Test func sortsStatuses() {
        #expect(verdict("HTTP/1.1 200 OK", "Content-Length: 1000") == .wholeFile(1000))
        #expect(verdict("HTTP/1.1 503 x", "Retry-After: 3") == .busy(after: 3))
        #expect(verdict("HTTP/1.1 429 x") == .busy(after: nil))
        #expect(verdict("HTTP/1.1 403 x") == .forbidden)
        #expect(
            verdict("HTTP/1.1 404 Not Found") == .error("the server answers 404 Not Found"))
        #expect(
            verdict("HTTP/1.1 416 x", "Content-Range: bytes */0", version: nil) == .empty)
        guard
            case .error = verdict(
                "HTTP/1.1 206 x", "Content-Range: bytes 100-199/1000", "Content-Encoding: gzip")
        else { return #expect(Bool(false)) }
    }

    @Test func asksForTheSameVersion() {
        #expect(Self.version.condition == "If-Match: \"1\"")
        let weak = HTTPVersion(size: 1, etag: "W/\"1\"", lastModified: "Mon")
        #expect(weak.condition == "If-Unmodified-Since: Mon")
        #expect(HTTPVersion(size: 1).condition == nil)
    }

    @Test func losesPatience() {
        var patience = HTTPPatience(retries: 3)
        #expect(patience.nextWait() == 250)
        #expect(patience.nextWait(asked: 2) == 2000)
        #expect(patience.nextWait() == 1000)
        #expect(patience.nextWait() == nil)
        patience.noteProgress()
        #expect(patience.nextWait() == 250)
        #expect(patience.nextWait(asked: 100_000) == nil)
        var none = HTTPPatience(retries: 0)
        #expect(none.nextWait() == nil)
    }
}
