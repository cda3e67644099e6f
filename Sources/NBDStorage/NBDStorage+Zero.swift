import DiskImage
import Glibc
import ImageStorage
import Synchronization

/// Making ranges zero: by the cheapest means that the server has.
extension NBDStorage {
    /// How much one request zeroes, in bytes: a server may take long over it.
    private static let zeroReach: Int64 = 1 << 30
    /// What is shorter is zeroed plainly: it is done sooner than it is known to be worth more, in bytes.
    private static let shortestTrim: Int64 = 64 << 10
    /// After how many refusals in a row something is not asked for any more. One says little: what is shorter than the
    /// server's blocks, or lies across their borders, is refused or stays.
    private static let mostRefusals = 8

    public func zero(_ range: Range<Int64>, mayUnmap: Bool) async throws {
        guard !range.isEmpty else { return }
        guard range.upperBound <= size else { throw beyondExport(range) }
        let block = facts.minimumBlock
        let start = range.lowerBound.roundedUp(to: block)
        let end = max(start, range.upperBound.roundedDown(to: block))
        guard start < end else { return try await writeZeros(range) }
        try await writeZeros(range.lowerBound..<start)
        let reach = max(block, Self.zeroReach.roundedDown(to: block))
        var position = start
        while position < end {
            let next = min(end, position + reach)
            try await zeroBlocks(position..<next, mayUnmap: mayUnmap)
            position = next
        }
        try await writeZeros(end..<range.upperBound)
    }

    /// Where zeros would have to be written, by the server or by us, a range that may become a hole is trimmed
    /// instead. What was trimmed may hold anything, so the server has to say that it is zero.
    private func zeroBlocks(_ range: Range<Int64>, mayUnmap: Bool) async throws {
        guard mayUnmap else { return try await zeroPlainly(range, .allocated) }
        guard range.count >= Self.shortestTrim, !facts.canZero || facts.canFastZero else {
            return try await zeroPlainly(range, .asServerLikes)
        }
        if facts.canZero, try await zeroFast(range) { return }
        for rest in try await trim(range) { try await zeroPlainly(rest, .asServerLikes) }
    }

    private func zeroPlainly(_ range: Range<Int64>, _ manner: NBDRequest.ZeroManner) async throws {
        guard facts.canZero, !refusesZero.load(ordering: .relaxed) else {
            return try await writeZeros(range)
        }
        do {
            try await change([
                NBDRequest(.zero(count: Int64(range.count), manner), at: range.lowerBound)
            ])
        } catch let error as ImageError
            where error.kind == .system(errno: ENOTSUP) && manner != .onlyFast
        {
            // A server that announces what the storage behind it cannot do. qemu-img writes zeros
            // then, too.
            refusesZero.store(true, ordering: .relaxed)
            try await writeZeros(range)
        }
    }

    /// - Returns: whether the server did it.
    private func zeroFast(_ range: Range<Int64>) async throws -> Bool {
        guard fastZeroRefusals.load(ordering: .relaxed) < Self.mostRefusals else { return false }
        do {
            try await zeroPlainly(range, .onlyFast)
            fastZeroRefusals.store(0, ordering: .relaxed)
            return true
        } catch let error as ImageError where error.kind == .system(errno: ENOTSUP) {
            fastZeroRefusals.add(1, ordering: .relaxed)
            return false
        }
    }

    /// - Returns: the parts that are not zero now, as far as the server says.
    private func trim(_ range: Range<Int64>) async throws -> [Range<Int64>] {
        // One connection need not know at once what was done on another, unless the server promises it.
        let isConfirmable = facts.canBlockStatus && (facts.canMultiConn || connections.count == 1)
        // Without FUA a trim that was acknowledged can be undone by the restart of a server, and it
        // is not repeated.
        let isKept = !mayReconnect || facts.canWriteThrough
        guard facts.canTrim, isConfirmable, isKept, !refusesTrim.load(ordering: .relaxed),
            keptTrims.load(ordering: .relaxed) < Self.mostRefusals
        else { return [range] }
        let rest: [Range<Int64>]
        do {
            try await sendChange([
                NBDRequest(.trim(count: Int64(range.count)), at: range.lowerBound)
            ])
            rest = try await notZero(range)
        } catch is ImageError {
            // Nothing is lost by that: what stands in its way stands in that of a write, too, or is of no concern.
            refusesTrim.store(true, ordering: .relaxed)
            return [range]
        }
        // Not part of what may fail: this flush speaks for other changes, too.
        try await makeStable()
        if rest == [range] {
            keptTrims.add(1, ordering: .relaxed)
        } else {
            keptTrims.store(0, ordering: .relaxed)
        }
        return rest
    }

    /// Asks anew, whatever was known of the range before.
    ///
    /// - Returns: the parts of which the server does not say that they are zero.
    private func notZero(_ range: Range<Int64>) async throws -> [Range<Int64>] {
        var parts: [Range<Int64>] = []
        func add(_ part: Range<Int64>) {
            if let last = parts.last, last.upperBound == part.lowerBound {
                parts[parts.count - 1] = last.lowerBound..<part.upperBound
            } else {
                parts.append(part)
            }
        }
        var answer = NBDBlockStatus()
        var position = range.lowerBound
        while position < range.upperBound {
            var extent = answer.extent(at: position, limit: range.upperBound)
            if extent == nil {
                let start = position.roundedDown(to: facts.minimumBlock)
                answer = try await blockStatus(start..<range.upperBound)
                extent = answer.extent(at: position, limit: range.upperBound)
            }
            // A server that says nothing more.
            let part = extent ?? Extent(range: position..<range.upperBound, content: .data)
            if part.content != .zero { add(part.range) }
            position = part.range.upperBound
        }
        return parts
    }

    private func writeZeros(_ range: Range<Int64>) async throws {
        guard !range.isEmpty else { return }
        let zeros = try IOBuffer.zeros(byteCount: Int(min(Int64(range.count), pieceSize)))
        var position = range.lowerBound
        while position < range.upperBound {
            let count = min(range.upperBound - position, pieceSize)
            try await write(zeros.bytes.extracting(0..<Int(count)), at: position)
            position += count
        }
    }
}
