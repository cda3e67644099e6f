import DiskImage
import Testing

@testable import Concurrency

struct IOBufferPoolTests {
    private func address(_ buffer: borrowing IOBuffer) -> UInt {
        buffer.bytes.withUnsafeBytes { UInt(bitPattern: $0.baseAddress) }
    }

    @Test func buffersUsedLastAreTakenFirst() throws {
        let pool = IOBufferPool()
        let one = try pool.take(byteCount: 4096)
        let two = try pool.take(byteCount: 4096)
        let (first, second) = (address(one), address(two))
        #expect(first != second)
        pool.giveBack(one)
        pool.giveBack(two)
        let three = try pool.take(byteCount: 4096)
        let four = try pool.take(byteCount: 100)
        let found = [address(three), address(four)]
        #expect(found == [second, first])
    }

    @Test func aBufferThatIsTooSmallIsNotTaken() throws {
        let pool = IOBufferPool()
        pool.giveBack(try IOBuffer(byteCount: 4096))
        let taken = try pool.take(byteCount: 4097)
        #expect(taken.byteCount == 4097)
    }
}
