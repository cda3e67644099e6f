import DiskImage
import Glibc
import ImageStorage
import Synchronization

/// Zeroes ranges by the cheapest means that the server has.
extension NBDStorage {
    /// Longest range for one request, in bytes: a server may take long to zero it.
    private static let zeroReach: Int64 = 1 << 30
    /// Shortest range in bytes for fast zeros or a trim: shorter ones are not worth the attempt.
    private static let shortestTrim: Int64 = 64 << 10
    /// Number of refusals in a row that end the attempts. One says little: a range that is shorter
    /// than the server's blocks, or crosses their borders, is refused or stays allocated.
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

    /// Zeroes whole blocks. If the server or we would have to write zeros, a range that may become
    /// a hole is trimmed instead. A trimmed range may hold anything, so the server has to say that
    /// it is zero.
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
            // The server announces zeroing, but the storage behind it cannot do that. qemu-img
            // writes zeros then, too.
            refusesZero.store(true, ordering: .relaxed)
            try await writeZeros(range)
        }
    }

    /// - Returns: whether the server has zeroed the range.
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

    /// - Returns: the parts that the server does not report as zero now.
    private func trim(_ range: Range<Int64>) async throws -> [Range<Int64>] {
        // Unless the server promises it, one connection may not see at once what another one did.
        let isConfirmable = facts.canBlockStatus && (facts.canMultiConn || connections.count == 1)
        // Without FUA the restart of a server can undo a trim that was acknowledged, and trims are
        // not repeated.
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
            // Nothing is lost: what makes this fail makes a write fail, too, or does not matter.
            refusesTrim.store(true, ordering: .relaxed)
            return [range]
        }
        // Not in the `do` block: this flush is for other changes, too, so its errors count.
        try await makeStable()
        if rest == [range] {
            keptTrims.add(1, ordering: .relaxed)
        } else {
            keptTrims.store(0, ordering: .relaxed)
        }
        return rest
    }

    /// Asks the server again, whatever was known about the range.
    ///
    /// - Returns: the parts that the server does not report as zero.
    private func notZero(_ range: Range<Int64>) async throws -> [Range<Int64>] {
        var parts: [Range<Int64>] = []
        func add(_ part: Range<Int64>) {
            if let last = parts.last, last.upperBound == part.lowerBound {
                parts[parts.count - 1] = last.lowerBound..<part.upperBound
            } else {
                parts.append(part)
            }
        }
        var answer = ExtentList()
        var position = range.lowerBound
        while position < range.upperBound {
            var extent = answer.extent(at: position, limit: range.upperBound)
            if extent == nil {
                let start = position.roundedDown(to: facts.minimumBlock)
                answer = try await blockStatus(start..<range.upperBound)
                extent = answer.extent(at: position, limit: range.upperBound)
            }
            // The server says nothing more, so the rest counts as data.
            let part = extent ?? Extent(range: position..<range.upperBound, isHole: false)
            if !part.isHole { add(part.range) }
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
